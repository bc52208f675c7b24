// oidc-provider as an issuer for tests: node server.mjs settings.json
// SIGHUP puts a new key in front of the ones that there are; SIGUSR2 takes back all that users have granted.
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import Provider, { errors } from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const keys = [];
const granted = new Set();
let provider;
let handle;

const stored = new Map();

// The one that comes with it is another for each provider.
class Adapter {
  constructor(model) {
    this.model = model;
  }

  key(id) {
    return `${this.model}:${id}`;
  }

  find(id) {
    return stored.get(this.key(id));
  }

  findBy(name, value) {
    return [...stored].find(([key, payload]) => key.startsWith(`${this.model}:`) && payload[name] === value)?.[1];
  }

  findByUid(uid) {
    return this.findBy('uid', uid);
  }

  findByUserCode(code) {
    return this.findBy('userCode', code);
  }

  upsert(id, payload) {
    stored.set(this.key(id), payload);
  }

  consume(id) {
    this.find(id).consumed = Math.floor(Date.now() / 1000);
  }

  destroy(id) {
    stored.delete(this.key(id));
  }

  revokeByGrantId(grantId) {
    for (const [key, payload] of stored) if (payload.grantId === grantId) stored.delete(key);
  }
}

// A JWT for the service, which is what most services want; without a resource the access tokens are opaque.
const resourceIndicators = {
  enabled: true,
  defaultResource: (ctx, client, oneOf) => (settings.resource_by_default ? settings.audience : oneOf),
  useGrantedResource: () => true,
  getResourceServerInfo: (ctx, resource) => {
    if (!settings.resources.includes(resource)) throw new errors.InvalidTarget();
    return { audience: resource, scope: 'read', accessTokenFormat: 'jwt', accessTokenTTL: settings.lifetime };
  },
};

function begin() {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  keys.unshift({ ...privateKey.export({ format: 'jwk' }), kid: randomUUID(), use: 'sig', alg: 'RS256' });
  provider = new Provider(settings.issuer, {
    adapter: Adapter,
    clients: settings.clients,
    clientAuthMethods: ['none', 'client_secret_basic', 'client_secret_post', 'client_secret_jwt', 'private_key_jwt'],
    cookies: { keys: ['of-tests'] },
    enabledJWA: { clientAuthSigningAlgValues: ['HS256', 'RS256', 'PS256', 'ES256', 'EdDSA'] },
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: true },
      deviceFlow: { enabled: true },
      resourceIndicators,
      revocation: { enabled: true },
    },
    findAccount: (ctx, sub) => ({ accountId: sub, claims: () => ({ sub }) }),
    jwks: { keys: [...keys] },
    rotateRefreshToken: settings.rotate,
    ttl: { AccessToken: settings.lifetime, ClientCredentials: settings.lifetime },
  });
  provider.on('refresh_token.saved', (token) => granted.add(token.grantId));
  handle = provider.callback();
}

async function revoke() {
  for (const id of granted) {
    await (await provider.Grant.find(id))?.destroy();
    granted.delete(id);
  }
  console.log('revoked');
}

begin();
process.on('SIGHUP', begin);
process.on('SIGUSR2', revoke);
createServer((request, response) => handle(request, response)).listen(settings.port, '127.0.0.1');
