"""Does it fit, and how long does it take? True programs compiled for chips that are not here."""
