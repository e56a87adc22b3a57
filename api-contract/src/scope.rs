//! Scopes: what a token allows its client to do.

use std::fmt;
use std::str::FromStr;

/// A right. `Admin` includes all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    WalletsRead,
    WalletsWrite,
    TransactionsRead,
    TransactionsWrite,
    WebhooksRead,
    WebhooksWrite,
    /// The log as it is, of all partners.
    AuditRead,
    /// Ending what is pending: our own workflows.
    Workflow,
    Admin,
}

/// Several rights: a small set, cheap to copy.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes(u16);

/// Not the name of a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such scope")]
pub struct UnknownScope;

impl Scope {
    pub const ALL: [Scope; 9] = [
        Self::WalletsRead,
        Self::WalletsWrite,
        Self::TransactionsRead,
        Self::TransactionsWrite,
        Self::WebhooksRead,
        Self::WebhooksWrite,
        Self::AuditRead,
        Self::Workflow,
        Self::Admin,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::WalletsRead => "wallets:read",
            Self::WalletsWrite => "wallets:write",
            Self::TransactionsRead => "transactions:read",
            Self::TransactionsWrite => "transactions:write",
            Self::WebhooksRead => "webhooks:read",
            Self::WebhooksWrite => "webhooks:write",
            Self::AuditRead => "audit:read",
            Self::Workflow => "workflow",
            Self::Admin => "admin",
        }
    }
}

impl Scopes {
    /// What a partner's client may do: everything of its own, nothing of the ledger as a whole.
    pub const PARTNER: Scopes = Scopes::of(&[
        Scope::WalletsRead,
        Scope::WalletsWrite,
        Scope::TransactionsRead,
        Scope::TransactionsWrite,
        Scope::WebhooksRead,
        Scope::WebhooksWrite,
    ]);

    /// What our own workflows may do: end what is pending, and read it.
    pub const WORKFLOW: Scopes = Scopes::of(&[Scope::Workflow, Scope::WalletsRead, Scope::TransactionsRead]);

    pub const ADMIN: Scopes = Scopes::of(&[Scope::Admin]);

    pub const fn of(scopes: &[Scope]) -> Self {
        let mut bits = 0;
        let mut next = 0;
        while next < scopes.len() {
            bits |= 1 << scopes[next] as u16;
            next += 1;
        }
        Self(bits)
    }

    /// Whether the right is among them, or `admin`, which includes it.
    pub const fn allow(self, scope: Scope) -> bool {
        self.0 & Self::of(&[scope, Scope::Admin]).0 != 0
    }

    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.0 & Self::of(&[*scope]).0 != 0)
    }
}

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(name: &str) -> Result<Self, UnknownScope> {
        Self::ALL.into_iter().find(|scope| scope.name() == name).ok_or(UnknownScope)
    }
}

/// As OAuth writes them: names with spaces between.
impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, scope) in self.iter().enumerate() {
            let space = if place == 0 { "" } else { " " };
            write!(f, "{space}{}", scope.name())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Scopes {
    type Err = UnknownScope;

    fn from_str(names: &str) -> Result<Self, UnknownScope> {
        let scopes: Vec<Scope> = names.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self::of(&scopes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_read_back_as_they_are_written() {
        for scopes in [Scopes::default(), Scopes::PARTNER, Scopes::WORKFLOW, Scopes::ADMIN, Scopes::of(&Scope::ALL)] {
            assert_eq!(scopes.to_string().parse::<Scopes>().unwrap(), scopes);
        }
        assert!("wallets:read root".parse::<Scopes>().is_err());
    }

    #[test]
    fn admin_allows_everything_and_a_partner_only_its_own_affairs() {
        for scope in Scope::ALL {
            assert!(Scopes::ADMIN.allow(scope), "{scope:?}");
            let of_the_whole = matches!(scope, Scope::AuditRead | Scope::Workflow | Scope::Admin);
            assert_eq!(Scopes::PARTNER.allow(scope), !of_the_whole, "{scope:?}");
        }
        assert!(!Scopes::WORKFLOW.allow(Scope::TransactionsWrite));
    }
}
