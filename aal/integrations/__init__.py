"""Callbacks for the training loops of other libraries; importing one imports its library."""
