"""`kdlm plan`"""
