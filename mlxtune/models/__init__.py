"""Where models come from and how packs of examples reach them."""
