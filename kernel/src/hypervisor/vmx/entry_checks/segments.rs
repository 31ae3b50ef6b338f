//! Checks of the guest's segment registers: Intel SDM vol. 3, 27.3.1.2.

use super::guest::RFLAGS_VM;
use super::{CR0_PE, Checks};
use crate::hypervisor::vmx::fields::{Field, SEGMENT_UNUSABLE};

/// The four fields of a segment register.
#[derive(Clone, Copy)]
struct SegmentFields {
    selector: Field,
    base: Field,
    limit: Field,
    rights: Field,
}

macro_rules! segment {
    ($selector:ident, $base:ident, $limit:ident, $rights:ident) => {
        SegmentFields {
            selector: Field::$selector,
            base: Field::$base,
            limit: Field::$limit,
            rights: Field::$rights,
        }
    };
}

const CS: SegmentFields = segment!(GuestCsSelector, GuestCsBase, GuestCsLimit, GuestCsAccessRights);
const SS: SegmentFields = segment!(GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsAccessRights);
const DS: SegmentFields = segment!(GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsAccessRights);
const ES: SegmentFields = segment!(GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsAccessRights);
const FS: SegmentFields = segment!(GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsAccessRights);
const GS: SegmentFields = segment!(GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsAccessRights);
const TR: SegmentFields = segment!(GuestTrSelector, GuestTrBase, GuestTrLimit, GuestTrAccessRights);
const LDTR: SegmentFields = segment!(GuestLdtrSelector, GuestLdtrBase, GuestLdtrLimit, GuestLdtrAccessRights);

const TABLE_INDICATOR: u64 = 1 << 2;
const UPPER_HALF: u64 = 0xFFFF_FFFF_0000_0000;

/// Access rights.
#[derive(Clone, Copy)]
struct Rights(u32);

impl Rights {
    const fn kind(self) -> u32 {
        self.0 & 0xF
    }

    const fn is_code_or_data(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    const fn dpl(self) -> u32 {
        self.0 >> 5 & 0b11
    }

    const fn is_present(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    const fn is_long(self) -> bool {
        self.0 & 1 << 13 != 0
    }

    const fn is_32_bit(self) -> bool {
        self.0 & 1 << 14 != 0
    }

    const fn is_granular(self) -> bool {
        self.0 & 1 << 15 != 0
    }

    const fn is_usable(self) -> bool {
        self.0 & SEGMENT_UNUSABLE == 0
    }
}

/// A data segment that can be written, has been accessed and grows up: what real mode has in CS.
const DATA_WRITABLE_ACCESSED: u32 = 3;

impl Checks<'_> {
    fn rights(&mut self, segment: SegmentFields) -> Rights {
        Rights(self.get_32(segment.rights))
    }

    fn rpl(&mut self, segment: SegmentFields) -> u32 {
        self.get_32(segment.selector) & 0b11
    }

    pub(super) fn segments(&mut self) {
        if self.get(Field::GuestRflags) & RFLAGS_VM != 0 {
            self.virtual_8086_segments();
        } else {
            self.code_segment();
            self.stack_segment();
            for segment in [DS, ES, FS, GS] {
                self.data_segment(segment);
            }
            for segment in [DS, ES] {
                if self.rights(segment).is_usable() {
                    self.require_clear(segment.base, UPPER_HALF, "upper half");
                }
            }
            for segment in [FS, GS] {
                self.require_canonical(segment.base);
            }
        }
        self.task_register();
        self.local_table();
    }

    fn virtual_8086_segments(&mut self) {
        for segment in [CS, SS, DS, ES, FS, GS] {
            let holds = self.get(segment.base) == self.get(segment.selector) << 4;
            self.require(holds, segment.base, "must be 16 times the selector in virtual-8086 mode");
            let holds = self.get(segment.limit) == 0xFFFF;
            self.require(holds, segment.limit, "must be 0xffff in virtual-8086 mode");
            let holds = self.get(segment.rights) == 0xF3;
            self.require(holds, segment.rights, "must be 0xf3 in virtual-8086 mode");
        }
    }

    /// What holds for every segment register in use.
    fn usable_segment(&mut self, segment: SegmentFields, is_system: bool) {
        let rights = self.rights(segment);
        let rule = if is_system { "S (bit 4) must be 0" } else { "S (bit 4) must be 1" };
        self.require(rights.is_code_or_data() != is_system, segment.rights, rule);
        self.require(rights.is_present(), segment.rights, "P (bit 7) must be 1");
        self.require_clear(segment.rights, 0xFFFE_0F00, "reserved");
        let limit = self.get_32(segment.limit);
        let holds = limit & 0xFFF == 0xFFF || !rights.is_granular();
        self.require(
            holds,
            segment.rights,
            "G (bit 15) must be 0 with a limit whose lower 12 bits are not all 1",
        );
        let holds = limit & 0xFFF0_0000 == 0 || rights.is_granular();
        self.require(holds, segment.rights, "G (bit 15) must be 1 with a limit of 1 MiB or more");
    }

    fn code_segment(&mut self) {
        let rights = self.rights(CS);
        self.usable_segment(CS, false);
        self.require(rights.is_usable(), CS.rights, "CS must be usable");
        self.require_clear(CS.base, UPPER_HALF, "upper half");
        let stack_dpl = self.rights(SS).dpl();
        match rights.kind() {
            DATA_WRITABLE_ACCESSED => {
                let unrestricted = self.is_unrestricted();
                self.require(unrestricted, CS.rights, "a data segment in CS needs unrestricted guest");
                self.require(rights.dpl() == 0, CS.rights, "a data segment in CS has DPL 0");
            }
            9 | 11 => {
                let holds = rights.dpl() == stack_dpl;
                self.require(holds, CS.rights, "a non-conforming CS has the DPL of SS");
            }
            13 | 15 => {
                let holds = rights.dpl() <= stack_dpl;
                self.require(holds, CS.rights, "a conforming CS has no higher DPL than SS");
            }
            _ => self.require(
                false,
                CS.rights,
                "the type of CS must be 9, 11, 13, 15, or 3 with unrestricted guest",
            ),
        }
        let holds = !self.is_ia32e() || !rights.is_long() || !rights.is_32_bit();
        self.require(holds, CS.rights, "D/B (bit 14) must be 0 in a 64-bit code segment");
    }

    fn stack_segment(&mut self) {
        let rights = self.rights(SS);
        if rights.is_usable() {
            self.usable_segment(SS, false);
            self.require(matches!(rights.kind(), 3 | 7), SS.rights, "the type of SS must be 3 or 7");
            self.require_clear(SS.base, UPPER_HALF, "upper half");
        }
        if !self.is_unrestricted() {
            let rpl = self.rpl(SS);
            let code_rpl = self.rpl(CS);
            self.require(rpl == code_rpl, SS.selector, "the RPL of SS must be that of CS");
            self.require(rights.dpl() == rpl, SS.rights, "the DPL of SS must be its RPL");
        }
        let is_real_mode = self.get(Field::GuestCr0) & CR0_PE == 0;
        if is_real_mode || self.rights(CS).kind() == DATA_WRITABLE_ACCESSED {
            self.require(rights.dpl() == 0, SS.rights, "the DPL of SS must be 0 in real mode");
        }
    }

    fn data_segment(&mut self, segment: SegmentFields) {
        let rights = self.rights(segment);
        if !rights.is_usable() {
            return;
        }
        self.usable_segment(segment, false);
        let kind = rights.kind();
        self.require(kind & 1 != 0, segment.rights, "the type must say accessed (bit 0)");
        let holds = kind & 8 == 0 || kind & 2 != 0;
        self.require(holds, segment.rights, "a code segment must be readable (bit 1)");
        if !self.is_unrestricted() && kind <= 11 {
            let holds = rights.dpl() >= self.rpl(segment);
            self.require(holds, segment.rights, "the DPL must not be lower than the RPL");
        }
    }

    fn task_register(&mut self) {
        let rights = self.rights(TR);
        self.usable_segment(TR, true);
        self.require(rights.is_usable(), TR.rights, "TR must be usable");
        self.require_clear(TR.selector, TABLE_INDICATOR, "table indicator");
        self.require_canonical(TR.base);
        let kind = rights.kind();
        if self.is_ia32e() {
            self.require(kind == 11, TR.rights, "the type of TR must be 11 (busy 64-bit TSS)");
        } else {
            self.require(matches!(kind, 3 | 11), TR.rights, "the type of TR must be 3 or 11 (busy TSS)");
        }
    }

    fn local_table(&mut self) {
        let rights = self.rights(LDTR);
        if !rights.is_usable() {
            return;
        }
        self.usable_segment(LDTR, true);
        self.require(rights.kind() == 2, LDTR.rights, "the type of LDTR must be 2");
        self.require_clear(LDTR.selector, TABLE_INDICATOR, "table indicator");
        self.require_canonical(LDTR.base);
    }
}
