"""What every folder uses: errors, versions, flag types, launch facts, shares, loops, phases."""
