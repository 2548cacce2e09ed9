"""The HTTP surface and the command line. `app.create_app` builds the server; this import alone is light."""
