package issuer;

import com.nimbusds.jose.JOSEException;
import com.nimbusds.jose.jwk.JWK;
import com.nimbusds.jose.jwk.JWKSet;
import com.nimbusds.jose.jwk.KeyUse;
import com.nimbusds.jose.jwk.RSAKey;
import com.nimbusds.jose.jwk.gen.RSAKeyGenerator;
import com.nimbusds.jose.jwk.source.JWKSource;
import com.nimbusds.jose.proc.SecurityContext;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.CopyOnWriteArrayList;
import org.springframework.beans.factory.annotation.Value;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.context.annotation.Bean;
import org.springframework.core.annotation.Order;
import org.springframework.security.config.Customizer;
import org.springframework.security.config.annotation.web.builders.HttpSecurity;
import org.springframework.security.core.userdetails.User;
import org.springframework.security.core.userdetails.UserDetailsService;
import org.springframework.security.oauth2.core.AuthorizationGrantType;
import org.springframework.security.oauth2.core.ClientAuthenticationMethod;
import org.springframework.security.oauth2.jose.jws.JwsAlgorithm;
import org.springframework.security.oauth2.jose.jws.MacAlgorithm;
import org.springframework.security.oauth2.jose.jws.SignatureAlgorithm;
import org.springframework.security.oauth2.server.authorization.InMemoryOAuth2AuthorizationConsentService;
import org.springframework.security.oauth2.server.authorization.InMemoryOAuth2AuthorizationService;
import org.springframework.security.oauth2.server.authorization.OAuth2Authorization;
import org.springframework.security.oauth2.server.authorization.OAuth2AuthorizationConsent;
import org.springframework.security.oauth2.server.authorization.OAuth2AuthorizationConsentService;
import org.springframework.security.oauth2.server.authorization.OAuth2AuthorizationService;
import org.springframework.security.oauth2.server.authorization.OAuth2TokenType;
import org.springframework.security.oauth2.server.authorization.client.InMemoryRegisteredClientRepository;
import org.springframework.security.oauth2.server.authorization.client.RegisteredClient;
import org.springframework.security.oauth2.server.authorization.client.RegisteredClientRepository;
import org.springframework.security.oauth2.server.authorization.config.annotation.web.configurers.OAuth2AuthorizationServerConfigurer;
import org.springframework.security.oauth2.server.authorization.settings.AuthorizationServerSettings;
import org.springframework.security.oauth2.server.authorization.settings.ClientSettings;
import org.springframework.security.oauth2.server.authorization.settings.TokenSettings;
import org.springframework.security.oauth2.server.authorization.token.JwtEncodingContext;
import org.springframework.security.oauth2.server.authorization.token.OAuth2TokenCustomizer;
import org.springframework.security.provisioning.InMemoryUserDetailsManager;
import org.springframework.security.web.SecurityFilterChain;
import org.springframework.security.web.authentication.LoginUrlAuthenticationEntryPoint;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RestController;

/**
 * Spring Authorization Server as an issuer for tests. POST /test/rotate puts a new key in front of those that there
 * are; POST /test/revoke ends all sessions.
 */
@SpringBootApplication
@RestController
public class Server {
    private static final String[] SCOPES = {"openid", "offline_access", "read"};

    @Value("${test.issuer}") private String issuer;
    @Value("${test.audience}") private String audience;
    @Value("${test.lifetime}") private int lifetime;
    @Value("${test.username}") private String username;
    @Value("${test.password}") private String password;
    @Value("${test.secret}") private String secret;
    @Value("${test.client-key}") private String clientKey;

    private final List<JWK> keys = new CopyOnWriteArrayList<>(List.of(newKey()));
    private final Sessions sessions = new Sessions();

    public static void main(String[] arguments) {
        SpringApplication.run(Server.class, arguments);
    }

    @PostMapping("/test/rotate")
    void rotate() {
        keys.add(0, newKey());
    }

    @PostMapping("/test/revoke")
    void revoke() {
        sessions.end();
    }

    /** The public key of the client that authenticates with one. */
    @GetMapping("/test/client-keys")
    Map<String, Object> clientKeys() throws java.text.ParseException {
        return new JWKSet(JWK.parse(clientKey)).toJSONObject(true);
    }

    /** Where the issuer sends people who have allowed a device. */
    @GetMapping("/")
    String done() {
        return "You can close this page.";
    }

    @Bean
    @Order(1)
    SecurityFilterChain endpoints(HttpSecurity http) throws Exception {
        OAuth2AuthorizationServerConfigurer server = OAuth2AuthorizationServerConfigurer.authorizationServer();
        return http.securityMatcher(server.getEndpointsMatcher())
            .with(server, configurer -> configurer.oidc(Customizer.withDefaults()))
            .authorizeHttpRequests(requests -> requests.anyRequest().authenticated())
            .exceptionHandling(errors -> errors.authenticationEntryPoint(new LoginUrlAuthenticationEntryPoint("/login")))
            .build();
    }

    @Bean
    @Order(2)
    SecurityFilterChain pages(HttpSecurity http) throws Exception {
        return http
            .authorizeHttpRequests(requests ->
                requests.requestMatchers("/", "/test/*").permitAll().anyRequest().authenticated())
            .csrf(csrf -> csrf.ignoringRequestMatchers("/test/*"))
            .formLogin(Customizer.withDefaults())
            .build();
    }

    @Bean
    UserDetailsService people() {
        return new InMemoryUserDetailsManager(
            User.withUsername(username).password("{noop}" + password).roles("USER").build());
    }

    @Bean
    RegisteredClientRepository clients() {
        RegisteredClient login = client("eoepca-login", ClientAuthenticationMethod.CLIENT_SECRET_BASIC)
            .clientSecret("{noop}" + secret)
            .authorizationGrantType(AuthorizationGrantType.AUTHORIZATION_CODE)
            .authorizationGrantType(AuthorizationGrantType.DEVICE_CODE)
            .authorizationGrantType(AuthorizationGrantType.REFRESH_TOKEN)
            .redirectUri("http://127.0.0.1/callback")
            .build();
        // It refuses two clients with the same secret.
        return new InMemoryRegisteredClientRepository(
            login,
            machine(ClientAuthenticationMethod.CLIENT_SECRET_BASIC)
                .clientSecret("{noop}" + secret + "-client_secret_basic").build(),
            machine(ClientAuthenticationMethod.CLIENT_SECRET_POST)
                .clientSecret("{noop}" + secret + "-client_secret_post").build(),
            // The secret is the key here, so no prefix says how it is stored.
            machine(ClientAuthenticationMethod.CLIENT_SECRET_JWT)
                .clientSecret(secret + "-client_secret_jwt")
                .clientSettings(assertions(MacAlgorithm.HS256).build()).build(),
            machine(ClientAuthenticationMethod.PRIVATE_KEY_JWT)
                .clientSettings(assertions(SignatureAlgorithm.ES256).jwkSetUrl(issuer + "/test/client-keys").build())
                .build());
    }

    /** The device grant asks for consent whatever the client's settings are. */
    @Bean
    OAuth2AuthorizationConsentService consents() {
        OAuth2AuthorizationConsent.Builder consent = OAuth2AuthorizationConsent.withId("eoepca-login", username);
        List.of(SCOPES).forEach(consent::scope);
        return new InMemoryOAuth2AuthorizationConsentService(consent.build());
    }

    @Bean
    OAuth2AuthorizationService sessions() {
        return sessions;
    }

    @Bean
    JWKSource<SecurityContext> keySource() {
        return (selector, context) -> selector.select(new JWKSet(keys));
    }

    @Bean
    OAuth2TokenCustomizer<JwtEncodingContext> tokens() {
        return context -> {
            // With more than one key, the encoder has to be told which one.
            context.getJwsHeader().keyId(keys.get(0).getKeyID());
            if (OAuth2TokenType.ACCESS_TOKEN.equals(context.getTokenType())) {
                // By default, the audience is the client, and nothing else names it.
                context.getClaims()
                    .audience(List.of(audience))
                    .claim("client_id", context.getRegisteredClient().getClientId());
            }
        };
    }

    @Bean
    AuthorizationServerSettings settings() {
        return AuthorizationServerSettings.builder().issuer(issuer).build();
    }

    private RegisteredClient.Builder client(String id, ClientAuthenticationMethod method) {
        return RegisteredClient.withId(id)
            .clientId(id)
            .clientAuthenticationMethod(method)
            .scopes(scopes -> scopes.addAll(List.of(SCOPES)))
            .tokenSettings(TokenSettings.builder()
                .accessTokenTimeToLive(Duration.ofSeconds(lifetime))
                .reuseRefreshTokens(false)
                .build());
    }

    private RegisteredClient.Builder machine(ClientAuthenticationMethod method) {
        return client("eoepca-" + method.getValue(), method)
            .authorizationGrantType(AuthorizationGrantType.CLIENT_CREDENTIALS);
    }

    private static ClientSettings.Builder assertions(JwsAlgorithm algorithm) {
        return ClientSettings.builder().tokenEndpointAuthenticationSigningAlgorithm(algorithm);
    }

    private static RSAKey newKey() {
        try {
            return new RSAKeyGenerator(2048).keyUse(KeyUse.SIGNATURE).keyID(UUID.randomUUID().toString()).generate();
        } catch (JOSEException error) {
            throw new IllegalStateException(error);
        }
    }

    /** The sessions in memory, which can all be ended at once. */
    private static final class Sessions implements OAuth2AuthorizationService {
        private volatile OAuth2AuthorizationService stored = new InMemoryOAuth2AuthorizationService();

        void end() {
            stored = new InMemoryOAuth2AuthorizationService();
        }

        @Override
        public void save(OAuth2Authorization session) {
            stored.save(session);
        }

        @Override
        public void remove(OAuth2Authorization session) {
            stored.remove(session);
        }

        @Override
        public OAuth2Authorization findById(String id) {
            return stored.findById(id);
        }

        @Override
        public OAuth2Authorization findByToken(String token, OAuth2TokenType type) {
            return stored.findByToken(token, type);
        }
    }
}
