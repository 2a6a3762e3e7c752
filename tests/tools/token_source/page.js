// livekit-client's token sources in a page of their own, which is another origin than the service. Bundled by install.sh.

import { orders } from "./orders.mjs";

window.order = (name, order) => orders[name](order);
