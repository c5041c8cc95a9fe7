"""Other ways to do one iteration of PPO, and the processes in which they and Gearshift's wait for their turn."""
