"""The paper's networks, their training and its experiments, on top of the core, which never imports them."""
