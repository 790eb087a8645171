"""What every folder uses: errors, versions, flags, launch facts, shares, files, loops, phases."""
