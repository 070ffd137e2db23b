//! The table of columns: a row for each section of an event, in the order in which text and JSON show them. A new one is a file here and
//! a row in `ALL`, with its bit (src/bpf/skb/skb.h) and its writer in C (`SKB_SECTIONS`).

mod column;
mod copies;
pub mod ct;
mod data;
mod drop;
pub mod facts;
mod map;
mod members;
pub mod meta;
pub mod nft;
mod owner;
pub mod packet;
mod places;
pub mod tuple;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

pub use column::{Column, Default, Of, Types};

pub static ALL: [Column; 18] = [
    data::DATA,
    packet::LIFE,
    map::MAP,
    packet::PACKET,
    owner::OWNER,
    meta::META,
    tuple::TUPLE,
    tuple::TUNNEL,
    ct::CT,
    copies::CB,
    members::MEMBERS,
    nft::NFT,
    drop::DROP,
    copies::SKB,
    copies::SHINFO,
    places::CALLER,
    places::STACK,
    facts::FACTS,
];

/// Index into [`ALL`] of each bit.
const BY_BIT: [Option<u8>; 32] = {
    let mut by_bit = [None; 32];
    let mut i = 0;
    while i < ALL.len() {
        by_bit[ALL[i].bit()] = Some(i as u8);
        i += 1;
    }
    by_bit
};

/// The column of a section.
pub fn of(section: u32) -> Option<&'static Column> {
    let index = BY_BIT.get(section.trailing_zeros() as usize)?;
    ALL.get(usize::from((*index)?))
}

/// Sections with this property.
pub fn sections(of: impl Fn(&Column) -> bool) -> u32 {
    let found = ALL.iter().filter(|column| of(column));
    found.fold(0, |sections, column| sections | column.section)
}

/// The columns' own flags.
#[derive(Debug, Clone, std::default::Default)]
pub struct ColumnArgs {
    /// sections that they ask for
    pub sections: u32,
    /// the same with --drops, unless the kernel lacks what they need
    pub with_drops: u32,
}

impl clap::Args for ColumnArgs {
    fn augment_args(command: Command) -> Command {
        let flags = ALL.iter().filter_map(|column| column.flag.as_ref());
        flags.fold(command, |command, flag| {
            let arg = Arg::new(flag.name).long(flag.name).help(flag.help);
            let arg = arg.help_heading("Output");
            if flag.default == Default::No {
                return command.arg(arg.action(ArgAction::SetTrue));
            }
            let arg = arg
                .action(ArgAction::Set)
                .value_name("BOOL")
                .value_parser(clap::value_parser!(bool))
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true");
            command.arg(match flag.default {
                Default::Yes => arg.default_value("true"),
                _ => arg,
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ColumnArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // `None`: neither the flag nor a default of its own
        let said = |flag: &column::Flag| matches.get_one::<bool>(flag.name).copied();
        let of = |which: fn(&column::Flag, Option<bool>) -> bool| {
            sections(|column| {
                let flag = column.flag.as_ref();
                flag.is_some_and(|flag| which(flag, said(flag)))
            })
        };
        Ok(Self {
            sections: of(|_, said| said == Some(true)),
            with_drops: of(|flag, said| flag.default == Default::WithDrops && said.is_none()),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::skb::types::skb_section;

    /// The sections of the C enum, by the decoder's order; the stack goes to the end of an event.
    #[test]
    fn each_section_has_a_row() {
        let all = sections(|_| true);
        assert_eq!(all.count_ones() as usize, ALL.len(), "two rows of one bit");
        assert_eq!(
            all.leading_zeros(),
            skb_section::SKB_SECTION_STACK.0.leading_zeros()
        );
        for column in &ALL {
            assert!(std::ptr::eq(of(column.section).unwrap(), column));
        }
    }
}
