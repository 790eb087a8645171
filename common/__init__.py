"""What every folder uses: errors, flag types, launch facts, equal shares, compiling."""
