"""A run as one page: data, model, recipe, figures, each with the file it came from."""
