//! Routing rules.

use katavm_protocol::agent::Rule;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};

use super::netlink::Netlink;
use super::{byte, family, ip};
use crate::error::Error;

/// Adds a rule, unless it is there.
pub fn add(netlink: &mut Netlink, rule: &Rule) -> Result<(), Error> {
    netlink
        .make(RouteNetlinkMessage::NewRule(message(rule)?))
        .map_err(|error| Error::io(format_args!("cannot add the routing rule of priority {}", rule.priority), error))
}

fn message(rule: &Rule) -> Result<RuleMessage, Error> {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.ip_version)?;
    message.header.action = byte("the action", rule.action)?.into();
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.header.tos = byte("the type of service", rule.tos)?;
    message.header.src_len = byte("the prefix length", rule.source_prefix)?;
    message.header.dst_len = byte("the prefix length", rule.destination_prefix)?;
    if rule.invert {
        message.header.flags |= RuleFlags::Invert;
    }
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.extend(ip(&rule.source)?.map(RuleAttribute::Source));
    attributes.extend(ip(&rule.destination)?.map(RuleAttribute::Destination));
    if rule.mark_mask != 0 {
        attributes.push(RuleAttribute::FwMark(rule.mark));
        attributes.push(RuleAttribute::FwMask(rule.mark_mask));
    }
    if !rule.incoming.is_empty() {
        attributes.push(RuleAttribute::Iifname(rule.incoming.clone()));
    }
    if !rule.outgoing.is_empty() {
        attributes.push(RuleAttribute::Oifname(rule.outgoing.clone()));
    }
    Ok(message)
}
