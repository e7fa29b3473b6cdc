"""How the networks in coup_lib/weights were made."""
