"""What the data sets are made of: decoded pixels, generated scenes."""
