"""Where frames come from, one service or format a file; each is a `Source` (see `source`)."""
