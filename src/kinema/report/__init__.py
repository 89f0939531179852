"""The run page: what a run did, on one HTML page that needs no server and no network."""
