use async_trait::async_trait;
use livekit_token_source::{TokenSourceConfigurable, TokenSourceFetchOptions, TokenSourceResponse, TokenSourceResult};
use url::Url;

/// The answer to `POST /_matrix/client/v3/user/{userId}/openid/request_token`.
pub struct OpenIdToken {
    pub access_token: String,
    pub matrix_server_name: String,
}

#[async_trait]
pub trait MatrixClient {
    async fn openid_token(&self) -> OpenIdToken;
}

/// `MatrixTokenSource { … }.cached()` asks for a fresh OpenID token only when a new LiveKit token is needed.
pub struct MatrixTokenSource<C> {
    /// The URL of lk-jwt-service.
    pub service: String,
    pub device_id: String,
    pub client: C,
}

#[async_trait]
impl<C: MatrixClient + Sync> TokenSourceConfigurable for MatrixTokenSource<C> {
    async fn fetch(&self, options: &TokenSourceFetchOptions) -> TokenSourceResult<TokenSourceResponse> {
        let openid = self.client.openid_token().await;
        let query = [("matrix_server_name", &openid.matrix_server_name), ("device_id", &self.device_id)];
        let url = Url::parse_with_params(&format!("{}/token_source", self.service), query).expect("a URL");
        livekit_token_source::endpoint(url)
            .with_header("Authorization", format!("Bearer {}", openid.access_token))
            .fetch(options)
            .await
    }
}
