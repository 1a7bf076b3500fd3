"""How the models are made: data, the VQ model, the supervised recipe and the scores. Installed as `modeling_lumina_mgpt.training`."""
