"""Workers on this machine: channel, zygote, worker body and their supervisor."""
