"""Pages a person opens in a browser: one file each, no network, nothing foreign ever runs."""
