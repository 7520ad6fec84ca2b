"""Programs that ask what a finished run is worth; nothing in the trainer imports them."""
