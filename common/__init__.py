"""What every folder uses: one-line errors, flag types, launch facts, shares, loops, phases."""
