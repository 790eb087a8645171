"""What every folder uses: one-line errors, flag types, launch facts, equal shares, compiling."""
