//! LiveKit's token sources in Rust, for the tests: orders are lines of JSON, as in `node.mjs`.

mod source;

use std::io::{BufRead as _, Write as _};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use livekit_token_source::{TokenSourceConfigurable as _, TokenSourceFetchOptions};
use serde_json::{Value, json};
use source::{MatrixClient, MatrixTokenSource, OpenIdToken};

/// Hands out the token that the test gave last.
#[derive(Clone, Default)]
struct Client(Arc<Mutex<(String, String)>>);

impl Client {
    fn set(&self, order: &Value) {
        *self.0.lock().unwrap() = (text(order, "token"), text(order, "server"));
    }
}

#[async_trait]
impl MatrixClient for Client {
    async fn openid_token(&self) -> OpenIdToken {
        let (access_token, matrix_server_name) = self.0.lock().unwrap().clone();
        OpenIdToken {
            access_token,
            matrix_server_name,
        }
    }
}

fn text(order: &Value, key: &str) -> String {
    order[key].as_str().unwrap_or_default().to_owned()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let client = Client::default();
    let mut source = None;
    for line in std::io::stdin().lock().lines() {
        let order: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let answer = match order["do"].as_str().unwrap() {
            "start" => {
                client.set(&order);
                let matrix = MatrixTokenSource {
                    service: text(&order, "service"),
                    device_id: text(&order, "device"),
                    client: client.clone(),
                };
                source = Some(matrix.cached());
                Ok(Value::Null)
            }
            "token" => {
                client.set(&order);
                Ok(Value::Null)
            }
            "fetch" => {
                let source = source.as_ref().expect("started");
                if order["force"] == true {
                    source.invalidate().await;
                }
                let mut options = TokenSourceFetchOptions::new().with_room_name(text(&order, "room"));
                if let Some(name) = order["name"].as_str() {
                    options = options.with_participant_name(name);
                }
                match source.fetch(&options).await {
                    Ok(response) => Ok(json!({"url": response.server_url, "jwt": response.participant_token})),
                    Err(error) => Err(error.to_string()),
                }
            }
            what => Err(format!("no such order: {what}")),
        };
        let said = match answer {
            Ok(ok) => json!({"id": order["id"], "ok": ok}),
            Err(error) => json!({"id": order["id"], "error": error}),
        };
        writeln!(std::io::stdout(), "{said}").unwrap();
    }
}
