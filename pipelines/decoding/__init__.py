"""How a file from outside is read where it can do no harm, and why it is refused."""
