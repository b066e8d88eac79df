//! The disks of a machine that is mirrored: each side has an image of its own, or both share one behind a fence.

use std::io;
use std::sync::Arc;

use devices::virtio::block::fence::{FenceError, Fences};
use devices::virtio::block::replica::{self, AgreeError, Replicas};
use mirror::guest::{DiskSync, LogKept};
use mirror::ids::{Epoch, LinkId};

use super::{KeepError, Machine, MachineError};

impl Machine {
    fn replicas(&self) -> &Replicas {
        self.shared.platform.virtio.replicas()
    }

    /// Whether the guest may be run from its disks.
    ///
    /// # Errors
    /// [`MachineError::Disk`]: one is a part of a copy.
    pub(crate) fn check_disks(&self) -> Result<(), MachineError> {
        Ok(self.replicas().iter().try_for_each(|disk| disk.check_complete())?)
    }

    /// The fences of its shared disks.
    pub(crate) fn fences(&self) -> &Arc<Fences> {
        self.shared.platform.virtio.fences()
    }

    /// What it takes to be mirrored: its shared disks are this side's, and what is written to them is there also for another.
    /// A machine that has this keeps it. `witness`: one decides who owns the guest.
    ///
    /// # Errors
    /// [`FenceError`]: it must not be mirrored.
    pub fn fence_disks(&self, witness: bool) -> Result<(), FenceError> {
        let virtio = &self.shared.platform.virtio;
        if virtio.fences().is_empty() {
            return Ok(());
        }
        virtio.fences().suffice(witness)?;
        virtio.fences().hold()?;
        virtio.write_through();
        virtio.drain();
        virtio.fences().sync()
    }

    /// Nothing that the guest asked for is still being carried out, nor will it be: its shared disks may be another side's.
    pub(super) fn let_go_of_disks(&self) {
        let virtio = &self.shared.platform.virtio;
        virtio.drain();
        virtio.fences().let_go();
    }

    // --- where the guest runs

    pub(super) fn agree_on_disks(&self, link: LinkId, answer: &[u8]) -> Result<(), AgreeError> {
        replica::agree(self.replicas(), link, answer)
    }

    pub(super) fn disks_follow(&self, links: &[LinkId]) -> io::Result<()> {
        self.replicas().iter().try_for_each(|disk| disk.follow(links))
    }

    pub(super) fn disks_part(&self, link: LinkId) {
        self.replicas().iter().for_each(|disk| disk.part(link));
    }

    pub(super) fn encode_disk_log(&self, link: LinkId, out: &mut Vec<u8>) {
        self.replicas().iter().for_each(|disk| disk.encode_log(link, out));
    }

    pub(super) fn synchronise_disks(&self, link: LinkId, out: &mut Vec<u8>) -> io::Result<()> {
        self.replicas().iter().try_for_each(|disk| disk.sync_round(link, out))
    }

    pub(super) fn disk_progress(&self, link: Option<LinkId>) -> DiskSync {
        let mut sum = DiskSync::default();
        for progress in self.replicas().iter().map(|disk| disk.progress(link)) {
            sum.bytes += progress.bytes;
            sum.left += progress.left;
            sum.lags |= progress.lags;
        }
        sum
    }

    // --- where it may come to run

    /// What there is of its disks, for the primary.
    pub(crate) fn answer_about_disks(&self) -> Vec<u8> {
        replica::answer(self.replicas())
    }

    pub(crate) fn keep_disk_log(&self, epoch: Epoch, log: Vec<u8>, kept: LogKept) -> Result<(), KeepError> {
        let kept = Box::new(|outcome: Result<(), KeepError>| kept(outcome.map_err(Into::into)));
        self.shared.platform.keeper.keep(epoch.0, log, kept)
    }

    /// Returns when its disks are those of the last epoch that was kept, and this side's to write to.
    pub(crate) fn take_over_disks(&self) -> Result<(), MachineError> {
        Ok(self.shared.platform.keeper.take_over()?)
    }
}
