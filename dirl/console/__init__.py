"""Commands for people: reports, talking to a model, and what is wrong with an installation."""
