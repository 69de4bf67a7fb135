"""PoLAR in `method_comparison/MetaMathQA`, where PEFT compares its methods; `README.md` has the reasons."""
