"""Other software's formats, in and out."""
