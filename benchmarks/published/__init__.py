"""The peers' published formulations, written out plainly from their papers and layouts."""
