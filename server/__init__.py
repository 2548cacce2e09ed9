"""The HTTP surface and the command line. `app.create_app` builds the server; importing this package imports nothing heavy."""
