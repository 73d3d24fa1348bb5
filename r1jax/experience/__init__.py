"""From prompts to what a policy is trained on: rollouts are made, rewarded, compared within their group, and packed."""
