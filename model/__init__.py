"""The network's parts: embedding tables, exchange, MLP, interaction, losses, batch."""
