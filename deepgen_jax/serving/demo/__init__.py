"""The web page of ``deepgen demo``: a client of the service, in Gradio."""
