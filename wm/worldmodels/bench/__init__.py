"""How fast the parts are, each beside what it is measured against (`wm bench`)."""
