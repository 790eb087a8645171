"""What every folder uses: errors of one line, flag types, launch facts, shares, compiling, phases."""
