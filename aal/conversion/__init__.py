"""Rules and lean layers for any model, in place."""
