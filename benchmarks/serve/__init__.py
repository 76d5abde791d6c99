"""What serve_load.py is made of: questions, a client, the server's process, the runs and their figures."""
