"""The hyperparameters and settings of a run: CONFIG, and the named RECIPES that override it.

A run's configuration is CONFIG, overridden by one recipe, overridden by the command line. It is a flat dict and stays what the
user wrote. The comment beside a key is its --help; engine/cli/keys.py says what it admits.
"""

# What a run's result depends on. A resumed run keeps these; epochs and batch_size follow rules of their own.
HYPERPARAMETERS = {
    # The seed's six.
    "batch_size": 256,  # images per optimizer step, of all GPUs together; 256 at 224 px fits the 16 GB of a T4
    "learning_rate": 0.0005,  # peak rate, reached after warmup_epochs; "auto" asks lr_finder.py first
    "epochs": 100,  # passes over the training images; warm-up and averaging keep their share of it unless they are given
    "weight_decay": 1e-4,  # per step, as the optimizer defines it; norms and biases get none unless decay_norms_and_biases
    "warmup_epochs": 10,  # epochs in which the rate rises to its peak; parts of epochs count
    "grad_clip_value": 1.0,  # largest global L2 norm of the true gradient; inf never clips
    # Model.
    "architecture": "resnet50",  # resnet50 is the subject; the smaller ones try an idea quickly
    "blur_pool": False,  # blurs before each strided convolution of 16 or more channels: arXiv:1904.11486
    "blur_max_pool": False,  # the first pooling takes the largest of every 3 x 3 px and blurs before its stride; same source
    "stochastic_depth": 0.0,  # probability that an image skips the last residual block, less for earlier ones: arXiv:1603.09382
    "sync_batch_norm": False,  # true: batch norm over the images of all GPUs; false: each GPU normalises over its own
    "initialization": "fan_out",  # Kaiming normal by fan_out, norms at 1; or by fan_in, norms from 0 to 1 (arXiv:1502.01852)
    "zero_init_residual": True,  # each block starts as the identity: arXiv:1706.02677, section 5.1
    "initial_weights": "none",  # file of weights (checkpoint.pt:ema chooses a kind) or torchvision:NAME; none begins at random
    "freeze": "none",  # not trained: none; stem, layer1, layer2 or layer3 and all before it; layer4: all but the last layer
    "size_rule": "none",  # bit: epochs, warm-up, mixup, resolution follow the images unless given (arXiv:1912.11370)
    # Data.
    "val_share": 0.0,  # share of each class's images that validates where data_dir has no validation images of its own
    "train_resolution": 224,  # px; side of the random crop that the network sees in training
    "start_resolution": 0,  # px; of the first epochs, growing to train_resolution; 0 never grows
    "resolution_step": 32,  # px by which a growing resolution grows; convolutions on a GPU like sizes that are multiples of 32
    "resolution_ramp_start": 0.75,  # share of the epochs after which it grows
    "resolution_ramp_end": 0.875,  # share of the epochs after which train_resolution is reached
    "val_resolution": 224,  # px; side of the centre crop in validation
    "val_flip": False,  # true also reports the accuracy of image plus mirror image, beside the plain one
    "min_crop_area": 0.08,  # smallest share of the image's area in a training crop; torchvision's default
    "val_crop_ratio": 0.875,  # centre crop's side over the resized shorter side; 224/256 is the custom
    "loss": "cross_entropy",  # cross_entropy, or bce: binary cross-entropy per class (arXiv:2110.00476)
    "class_weights": "none",  # balanced: in the loss all classes count the same, however many images each has
    "label_smoothing": 0.0,  # share of each label spread evenly over all classes
    "mixup_alpha": 0.0,  # mixup blends two images by a share from Beta(alpha, alpha); 0 never blends (arXiv:1710.09412)
    "cutmix_alpha": 0.0,  # cutmix pastes a box, its area from Beta(alpha, alpha), of another image; 0 never (arXiv:1905.04899)
    "augmentation": "none",  # randaugment (arXiv:1909.13719), composer_randaugment, trivialaugment (arXiv:2103.10158)
    "randaugment_ops": 2,  # changes that randaugment or composer_randaugment makes to each image
    "randaugment_magnitude": 9,  # strength of each of these changes, from 0 to 30; composer_randaugment draws it up to this
    "color_jitter": 0.0,  # largest relative change of brightness, contrast and saturation
    "random_erasing": 0.0,  # probability that a box of an image is painted over (arXiv:1708.04896)
    "colout": 0.0,  # share of the rows and of the columns that a batch loses, the same in all its images (MosaicML's ColOut)
    # Optimizer. The seed's notes name SGD and AdamW as not yet tried, so its run probably used Adam; adamw is our choice.
    "optimizer": "adamw",  # adamw, sgdw (decoupled decay, sgdw's as rate over peak), adam, sgd (L2 in the gradient), muon
    "adamw_learning_rate": 0.001,  # with muon: peak rate of what AdamW trains: first convolution, last layer, norms, biases
    "backbone_rate_factor": 1.0,  # rate of all but the last layer, as a share of the last layer's
    "momentum": 0.9,  # momentum of sgd, sgdw and muon (0.95 is usual there); Adam's betas are torch's defaults
    "nesterov": False,  # true looks ahead along sgd's momentum; muon always does
    "scale_learning_rate": False,  # true multiplies the rates, and sgdw's weight_decay, by batch_size / 256
    "decay_norms_and_biases": False,  # true also decays the parameters of one dimension
    "sam_rho": 0.0,  # radius of SAM's ascent step (arXiv:2010.01412); 0: no SAM
    "sam_every_steps": 10,  # steps between those with SAM, each of which costs a second forward and backward pass
    # Learning-rate schedule, stepped once per optimizer step.
    "schedule": "onecycle",  # onecycle; or after a linear warm-up cosine (to 0), step (drops) or constant
    "step_epochs": 30,  # epochs between the drops of schedule step, counted from the start of the run
    "step_factor": 0.1,  # what a drop of schedule step multiplies the rate by
    "onecycle_anneal": "cos",  # cos or linear: the shape of rise and fall
    "onecycle_div_factor": 25.0,  # the rate starts at learning_rate / this
    "onecycle_final_div_factor": 1e4,  # the rate ends at its start / this
    # Weight averaging (SWA, arXiv:1803.05407).
    "swa_start_epoch": 32,  # first epoch, counted from 1, whose final weights enter the average; 0 never averages
    "swa_learning_rate": 0.00025,  # rate while averaging; follows learning_rate unless given; 0 leaves OneCycleLR untouched
    "swa_anneal_epochs": 5,  # epochs of cosine passage from OneCycleLR's rate to swa_learning_rate
    "swa_batch_norm_batches": 200,  # training batches that give the averaged weights their batch-norm statistics
    "ema_half_life_images": 0,  # images after which weights count half in a running average (EMA); 0 keeps none
    "ema_every_images": 5120,  # images between the weights that enter it, in whole batches
    # Random numbers.
    "seed": 0,  # seeds weights, order and augmentation; the same seed on the same CPU gives the same bits
}

# Where and how it runs: none of these can bend the run, so a resumed run may change them.
SETTINGS = {
    # Data and workers.
    "data_dir": "data/imagenet",  # folder of train.arrow and val.arrow (or its URL), or of train/<class>/* and val/<class>/*
    "local_data_dir": "data/fetched",  # folder that the images are copied to where data_dir is a URL (s3://, gs://, az://)
    "make_demo_data": False,  # true makes the demo's synthetic images in data_dir on first use
    "num_workers": "auto",  # processes that decode images, for each GPU; "auto" shares out the cores, 0 is the main process
    "max_bad_images": 100,  # unreadable training images replaced before the run stops; in validation the first one stops it
    # Numbers and device.
    "device": "auto",  # auto, cuda or cpu
    "precision": "auto",  # auto, fp32, fp16 (with a GradScaler) or bf16; auto takes bf16 where the hardware has it
    "compile": "auto",  # torch.compile of the network: on, off, auto where it is faster on a GPU, measure where it is anywhere
    "memory": "fast",  # fast keeps all activations; low and lowest compute ever more of them again, to the same bits
    "micro_batch_size": 0,  # images per forward pass of a GPU; 0 is all it gets, halved when its memory runs out
    "deterministic": False,  # true: a GPU gives the same bits each time, after a resumption too; slower, how much is unmeasured
    "max_bad_steps": 20,  # steps in a row with a non-finite loss or gradient before the run stops
    # Records.
    "checkpoint_dir": "checkpoints",  # folder of last.pt, best.pt, epoch_005.pt, metrics.jsonl and curves.png
    "mirror": "none",  # place that the checkpoints are uploaded to: s3://bucket/run, gs://, az:// or a folder; needs obstore
    "checkpoint_every_epochs": 5,  # epochs between the kept epoch_NNN.pt; 0 keeps none
    "checkpoint_minutes": 10.0,  # minutes between saves of last.pt inside an epoch; the most that a kill can cost
    "keep_checkpoints": 0,  # newest epoch_NNN.pt to keep; 0 keeps all (about 0.4 GB each with AdamW and SWA)
    "log_file": "training.log",  # time-stamped record of everything logged, appended to
    "log_every_steps": 50,  # steps between readings of the loss; each one waits for the device
    "report": True,  # writes report.html and report.md to checkpoint_dir when the run has come to its end
    "tensorboard": False,  # true also writes every epoch's figures for TensorBoard, to checkpoint_dir/tensorboard
    "validate_every_epochs": 1,  # epochs between validations; the last epoch always has one; best.pt holds validated weights
    "more_val_resolutions": [],  # px, as 192,288; the finished weights are scored there too (FixRes, arXiv:1906.06423)
    # Interruption.
    "spot_notice": False,  # true polls the EC2 instance metadata for the two-minute termination notice
    "spot_notice_url": "http://169.254.169.254",  # address of the instance metadata service (IMDSv2)
}

CONFIG = HYPERPARAMETERS | SETTINGS

# FFCV's ResNet-50 schedule, stretched by --epochs. Published for 8 A100s at batch 4,096, 256 px with flip: 73.76 % in 16
# epochs, 75.56 in 24, 76.59 in 32, 77.24 in 40, 78.43 in 88 (libffcv/ffcv-imagenet, assets/agg.csv); without flip none.
# 16 epochs are 9.1 epochs' worth of 224 px: with validation 12.1 T4 hours at 282 images/s (calculated).
FFCV = {
    "batch_size": 256,
    "learning_rate": 0.10625,  # 1.7 at batch 4,096
    "scale_learning_rate": True,
    "epochs": 16,
    "warmup_epochs": 2,
    "grad_clip_value": float("inf"),
    "blur_pool": True,
    "zero_init_residual": False,
    "train_resolution": 192,
    "start_resolution": 160,
    "val_resolution": 256,
    "val_flip": True,
    "label_smoothing": 0.1,
    "optimizer": "sgd",
    "onecycle_anneal": "linear",
    "onecycle_div_factor": 1e4,
    "onecycle_final_div_factor": 1e12,
    "swa_start_epoch": 0,
}

# MosaicML's three recipes for ever longer runs (mosaicml/examples, blogs/resnet/recipes/*.yaml; Composer 0.7.1), written for
# batches of 2,048 on 8 GPUs: 76.19 % published for mild at 28.8 epochs, 75 to 78.1 below 60 epochs, 78.1 to 79.5 for medium
# from 60 to 240. What differs from them is in docs/recipes.md. mild's 29 epochs are 9.8 epochs' worth of 224 px: with
# validation 13.3 T4 hours at 282 images/s (calculated).
MILD = {
    "batch_size": 256,
    "learning_rate": 0.256,  # 2.048 at batch 2,048
    "scale_learning_rate": True,
    "epochs": 29,
    "weight_decay": 6.25e-5,  # 5e-4 at batch 2,048
    "warmup_epochs": 29 * 8 / 90,
    "grad_clip_value": float("inf"),
    "blur_pool": True,
    "blur_max_pool": True,
    "initialization": "fan_in",
    "zero_init_residual": False,
    "train_resolution": 176,
    "start_resolution": 88,
    "resolution_step": 4,
    "resolution_ramp_start": 0.4,
    "resolution_ramp_end": 0.8,
    "val_resolution": 224,
    "val_crop_ratio": 224 / 232,
    "loss": "bce",
    "label_smoothing": 0.08,
    "optimizer": "sgdw",
    "momentum": 0.875,
    "decay_norms_and_biases": True,
    "schedule": "cosine",
    "swa_start_epoch": 0,
    "ema_half_life_images": 204_800,  # 100 batches of 2,048
    "ema_every_images": 40_960,  # 20
}
MEDIUM = MILD | {
    "epochs": 90,
    "warmup_epochs": 8,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.2,
    "sam_rho": 0.5,
    "sam_every_steps": 10,
}
# mild with another optimizer; nobody has published it. docs/recipes.md says what speaks for it, and which run would prove it.
MUON = MILD | {
    "optimizer": "muon",
    "learning_rate": 0.02,  # with this decay, a run shrinks the weights by e^-5.8; in the study, at 0.3, by e^-6 (calculated)
    "weight_decay": 0.004,
    "momentum": 0.95,
    "decay_norms_and_biases": False,
}
HOT = MEDIUM | {
    "epochs": 270,
    "warmup_epochs": 24,
    "weight_decay": 3.75e-5,  # 3e-4 at batch 2,048
    "stochastic_depth": 0.1,
    "start_resolution": 104,  # 0.6 of 176 px, in steps of 4
    "resolution_ramp_start": 0.2,
    "label_smoothing": 0.13,
    "mixup_alpha": 0.25,
    "augmentation": "composer_randaugment",
    "randaugment_ops": 1,
    "randaugment_magnitude": 30,  # severity 10 of 10
    "colout": 0.05,
    "sam_every_steps": 5,
}

RECIPES = {
    # The run that this project set out to beat: 59.21 % top-1 after about 65 hours on a T4.
    "seed": {},
    "fast": FFCV,
    # The same for 88 epochs: 78.43 % published; 48.9 epochs' worth of 224 px: with validation 65.2 T4 hours at 282
    # images/s (calculated).
    "long": FFCV | {"epochs": 88},
    "mild": MILD,
    "medium": MEDIUM,
    "hot": HOT,
    "muon": MUON,
    # From initial_weights to one's own classes: BiT-HyperRule (arXiv:1912.11370); docs/finetuning.md says what differs.
    "finetune": {
        "batch_size": 32,
        "learning_rate": 0.0015,  # 0.003 at batch 512
        "scale_learning_rate": True,
        "epochs": 10,  # these two only where --epochs or --hours says how long; else size_rule does
        "warmup_epochs": 2,
        "weight_decay": 0.0,
        "grad_clip_value": float("inf"),
        "size_rule": "bit",
        "val_share": 0.2,
        "checkpoint_every_epochs": 0,
        "min_crop_area": 0.73,  # 384 of 448 px, squared
        "optimizer": "sgd",
        "schedule": "cosine",
        "swa_start_epoch": 0,
    },
    # A data set that the program makes itself, learned by the same ResNet-50 in minutes on a CPU.
    "demo": {
        "data_dir": "data/demo",
        "make_demo_data": True,
        "checkpoint_dir": "checkpoints/demo",
        "batch_size": 32,
        "learning_rate": 0.001,
        "epochs": 8,
        "warmup_epochs": 1,
        "train_resolution": 48,
        "val_resolution": 48,
        "min_crop_area": 0.6,
        "swa_start_epoch": 6,
        "swa_learning_rate": 0.0003,
        "swa_anneal_epochs": 1,
        "swa_batch_norm_batches": 20,
        "log_every_steps": 5,
    },
}
