"""How an answer is made and checked: by a language model, or out of the passages themselves."""
