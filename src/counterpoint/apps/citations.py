"""BibTeX of everything a picture may owe something to."""

from __future__ import annotations

CITATIONS = {
    "diffusers": """@misc{vonplaten2022diffusers,
  title  = {Diffusers: State-of-the-art diffusion models},
  author = {von Platen, Patrick and Patil, Suraj and Lozhkov, Anton and Cuenca, Pedro and Lambert, Nathan and Rasul,
            Kashif and Davaadorj, Mishig and Wolf, Thomas},
  year   = {2022},
  note   = {https://github.com/huggingface/diffusers}
}""",
    "stable-diffusion": """@inproceedings{rombach2022ldm,
  title     = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author    = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\"o}rn},
  booktitle = {CVPR},
  year      = {2022},
  note      = {arXiv:2112.10752}
}""",
    "controlnet": """@inproceedings{zhang2023controlnet,
  title     = {Adding Conditional Control to Text-to-Image Diffusion Models},
  author    = {Zhang, Lvmin and Rao, Anyi and Agrawala, Maneesh},
  booktitle = {ICCV},
  year      = {2023},
  note      = {arXiv:2302.05543}
}""",
    "classifier-free-guidance": """@misc{ho2022cfg,
  title  = {Classifier-Free Diffusion Guidance},
  author = {Ho, Jonathan and Salimans, Tim},
  year   = {2022},
  note   = {arXiv:2207.12598}
}""",
    "unipc": """@inproceedings{zhao2023unipc,
  title     = {{UniPC}: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models},
  author    = {Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen},
  booktitle = {NeurIPS},
  year      = {2023},
  note      = {arXiv:2302.04867}
}""",
    "ddim": """@inproceedings{song2021ddim,
  title     = {Denoising Diffusion Implicit Models},
  author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {ICLR},
  year      = {2021},
  note      = {arXiv:2010.02502}
}""",
    "cross-controlnet": """@misc{crosscontrolnet2025,
  title  = {{Cross-ControlNet}: Training-Free Fusion of Multiple Conditions for Text-to-Image Generation},
  author = {Anonymous},
  year   = {2025},
  note   = {Under double-blind review}
}""",
    "maxfusion": """@inproceedings{nair2024maxfusion,
  title     = {{MaxFusion}: Plug\\&Play Multi-Modal Generation in Text-to-Image Diffusion Models},
  author    = {Nair, Nithin Gopalakrishnan and Valanarasu, Jeya Maria Jose and Patel, Vishal M.},
  booktitle = {ECCV},
  year      = {2024},
  note      = {arXiv:2404.09977}
}""",
    "minimal-impact": """@inproceedings{sun2025minimal,
  title     = {Minimal Impact {ControlNet}: Advancing Multi-{ControlNet} Integration},
  author    = {Sun, Shikun and Zhou, Min and Wang, Zixuan and Li, Xubin and Ge, Tiezheng and Ye, Zijie and
               Qin, Xiaoyu and Xing, Junliang and Zheng, Bo and Jia, Jia},
  booktitle = {ICLR},
  year      = {2025}
}""",
    "mgda": """@article{desideri2012mgda,
  title   = {Multiple-gradient descent algorithm ({MGDA}) for multiobjective optimization},
  author  = {D{\\'e}sid{\\'e}ri, Jean-Antoine},
  journal = {Comptes Rendus Mathematique},
  volume  = {350},
  pages   = {313--318},
  year    = {2012}
}""",
    "amdm": """@misc{amdm2024,
  title  = {Aggregation of Multi Diffusion Models for Enhancing Learned Representations},
  year   = {2024},
  note   = {arXiv:2410.01262}
}""",
    "readout": """@inproceedings{luo2024readout,
  title     = {Readout Guidance: Learning Control from Diffusion Features},
  author    = {Luo, Grace and Darrell, Trevor and Wang, Oliver and Goldman, Dan B and Holynski, Aleksander},
  booktitle = {CVPR},
  year      = {2024}
}""",
    "interact": """@inproceedings{hoe2024interactdiffusion,
  title     = {{InteractDiffusion}: Interaction Control in Text-to-Image Diffusion Models},
  author    = {Hoe, Jiun Tian and Jiang, Xudong and Chan, Chee Seng and Tan, Yap-Peng and Hu, Weipeng},
  booktitle = {CVPR},
  year      = {2024},
  note      = {arXiv:2312.05849}
}""",
    "gligen": """@inproceedings{li2023gligen,
  title     = {{GLIGEN}: Open-Set Grounded Text-to-Image Generation},
  author    = {Li, Yuheng and Liu, Haotian and Wu, Qingyang and Mu, Fangzhou and Yang, Jianwei and Gao, Jianfeng and
               Li, Chunyuan and Lee, Yong Jae},
  booktitle = {CVPR},
  year      = {2023},
  note      = {arXiv:2301.07093}
}""",
    "migc": """@inproceedings{zhou2024migc,
  title     = {{MIGC}: Multi-Instance Generation Controller for Text-to-Image Synthesis},
  author    = {Zhou, Dewei and Li, You and Ma, Fan and Zhang, Xiaoting and Yang, Yi},
  booktitle = {CVPR},
  year      = {2024},
  note      = {arXiv:2402.05408}
}""",
    "ip-adapter": """@misc{ye2023ipadapter,
  title  = {{IP-Adapter}: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models},
  author = {Ye, Hu and Zhang, Jun and Liu, Sibo and Han, Xiao and Yang, Wei},
  year   = {2023},
  note   = {arXiv:2308.06721}
}""",
}
"""Key -> BibTeX. Fusion rules name their keys in the table of rules, adapters are called by their kind."""
