"""How faithful an SAE is: what is measured on held-out sentences, and the page of it."""
