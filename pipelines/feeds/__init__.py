"""Where files appear, and how they come here: folders, buckets, web pages."""
