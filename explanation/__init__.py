"""The pages of explain.py: the gallery, what a page knows of its pixels, drawing, rendering."""
