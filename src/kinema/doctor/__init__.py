"""What can be known of a machine and a job before the job's first step: `kinema doctor`."""
