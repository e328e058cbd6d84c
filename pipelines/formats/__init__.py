"""What files from outside are made of: their arrays, axes, packing and georeference, read with distrust."""
