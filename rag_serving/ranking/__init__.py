"""Ways to order passages anew, and what each needs."""
