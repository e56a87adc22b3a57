//! The clients: made by the operator, or as the log says.
//!
//! A partner's client follows the partner's events: registered, it is there; suspended, it gets no tokens; its secret
//! rotated, the old one is worth nothing. The log is the truth of that, and what is written here comes after it. So a
//! crash between the two leaves nothing half done: command-api follows the log when it starts and every few seconds, and
//! each event changes a client once. The secret itself is in no event. When it is lost before it came here, the client has
//! none, and the operator rotates it again.

use ledger_core::{ClientId, PartnerEvent, PartnerId};

use crate::audit::Act;
use crate::pool::within_bounds;
use crate::{Access, AccessError, Scopes, Secret};

/// A client to be made. Id and secret come from the caller, who shows or keeps the secret.
#[derive(Clone, Debug)]
pub struct NewClient {
    pub id: ClientId,
    pub partner: Option<PartnerId>,
    pub secret: Secret,
    pub scopes: Scopes,
}

/// Something that happened to a partner, and where the log has it.
#[derive(Clone, Debug)]
pub struct PartnerChange {
    pub position: i64,
    pub partner: PartnerId,
    pub event: PartnerEvent,
}

impl Access {
    /// A client that there was not.
    pub async fn create_client(&self, client: NewClient) -> Result<(), AccessError> {
        let created = sqlx::query(
            "insert into access.clients (id, partner_id, secret_hash, scopes) values ($1, $2, $3, $4) on conflict (id) do nothing",
        );
        let done = bind(created, &client).execute(self.pool()).await?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(AccessError::ClientExists) }
    }

    /// A client that there shall be, with exactly this secret and these scopes. Repeating it changes nothing, and a secret
    /// that was rotated stays so. A change ends the tokens that the client has, and is written down.
    pub async fn ensure_client(&self, client: NewClient) -> Result<(), AccessError> {
        let ensured = sqlx::query(
            "insert into access.clients as known (id, partner_id, secret_hash, scopes) values ($1, $2, $3, $4)
             on conflict (id) do update
             set partner_id = excluded.partner_id, secret_hash = excluded.secret_hash, scopes = excluded.scopes,
                 generation = known.generation + 1, revoked_at = clock_timestamp()
             where known.secret_position = 0
               and (known.partner_id, known.secret_hash, known.scopes)
                   is distinct from (excluded.partner_id, excluded.secret_hash, excluded.scopes)",
        );
        let mut tx = self.pool().begin().await?;
        if bind(ensured, &client).execute(&mut *tx).await?.rows_affected() == 1 {
            // Who may set one is who has the database: nobody else could be named.
            Act::new("client-set").by(client.id).with("scopes", client.scopes).record(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Gives the client the secret that belongs to an event which [`Access::follow`] has followed. False when the client has
    /// one already, or a later event has taken it away.
    pub async fn set_secret(&self, client: ClientId, position: i64, secret: &Secret) -> Result<bool, AccessError> {
        let hash = secret.hash();
        let set = sqlx::query(
            "update access.clients set secret_hash = $3 where id = $1 and secret_position = $2 and secret_hash is null",
        )
        .bind(client.uuid())
        .bind(position)
        .bind(hash.as_slice())
        .execute(self.pool());
        Ok(within_bounds(set).await?.rows_affected() == 1)
    }

    /// Up to which partner's event the clients are as the log says.
    pub async fn followed(&self) -> Result<i64, AccessError> {
        let followed = sqlx::query_scalar("select position from access.followed").fetch_one(self.pool());
        Ok(within_bounds(followed).await?)
    }

    /// Brings the clients up to these events: all that the log has of partners after [`Access::followed`], in order. What
    /// has been followed before, here or by another instance, is left out.
    pub async fn follow(&self, changes: &[PartnerChange]) -> Result<(), AccessError> {
        let Some(last) = changes.last() else { return Ok(()) };
        within_bounds(self.follow_to(last.position, changes)).await?;
        self.read_changes().await
    }

    async fn follow_to(&self, last: i64, changes: &[PartnerChange]) -> Result<(), AccessError> {
        let mut tx = self.pool().begin().await?;
        // The lock makes two instances follow one after the other.
        let followed: i64 =
            sqlx::query_scalar("select position from access.followed for update").fetch_one(&mut *tx).await?;
        for change in changes.iter().filter(|change| followed < change.position) {
            follow_one(change, &mut tx).await?;
        }
        sqlx::query("update access.followed set position = $1 where position < $1")
            .bind(last)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }
}

async fn follow_one(change: &PartnerChange, connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
    let PartnerChange { position, partner, event } = change;
    match event {
        PartnerEvent::Registered { client_id, .. } => {
            // Whoever set up the installation may have made the client before, with a secret of its choice.
            sqlx::query(
                "insert into access.clients (id, partner_id, secret_position, scopes) values ($1, $2, $3, $4)
                 on conflict (id) do nothing",
            )
            .bind(client_id.uuid())
            .bind(partner.uuid())
            .bind(position)
            .bind(names(Scopes::PARTNER))
            .execute(connection)
            .await?;
        }
        PartnerEvent::Suspended { .. } => {
            sqlx::query(
                "update access.clients
                 set suspended = true, generation = greatest(generation + 1, $2), revoked_at = clock_timestamp()
                 where partner_id = $1",
            )
            .bind(partner.uuid())
            .bind(position)
            .execute(connection)
            .await?;
        }
        PartnerEvent::Resumed {} => {
            sqlx::query("update access.clients set suspended = false where partner_id = $1")
                .bind(partner.uuid())
                .execute(connection)
                .await?;
        }
        PartnerEvent::SecretRotated { client_id } => {
            sqlx::query(
                "update access.clients set secret_hash = null, secret_position = $2,
                     generation = greatest(generation + 1, $2), revoked_at = clock_timestamp()
                 where id = $1 and secret_position < $2",
            )
            .bind(client_id.uuid())
            .bind(position)
            .execute(connection)
            .await?;
        }
    }
    Ok(())
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind<'q>(query: Query<'q>, client: &NewClient) -> Query<'q> {
    query
        .bind(client.id.uuid())
        .bind(client.partner.map(PartnerId::uuid))
        .bind(client.secret.hash().to_vec())
        .bind(names(client.scopes))
}

fn names(scopes: Scopes) -> Vec<String> {
    scopes.iter().map(|scope| scope.name().to_owned()).collect()
}
