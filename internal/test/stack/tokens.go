package stack

import (
	"context"
	"crypto/rand"
	"fmt"

	consulapi "github.com/hashicorp/consul/api"
	nomadapi "github.com/hashicorp/nomad/api"
)

// Token is an ACL token of Nomad or Consul.
type Token struct{ Accessor, Secret string }

// NewToken creates a token that may do what these rules allow. Nomad must have a
// ManagementToken.
func (n *Nomad) NewToken(ctx context.Context, rules string) (Token, error) {
	client, err := n.Client()
	if err != nil {
		return Token{}, err
	}
	opts := (&nomadapi.WriteOptions{}).WithContext(ctx)
	policy := &nomadapi.ACLPolicy{Name: "test-" + rand.Text(), Rules: rules}
	if _, err := client.ACLPolicies().Upsert(policy, opts); err != nil {
		return Token{}, fmt.Errorf("stack: create a policy in Nomad: %w", err)
	}
	token, _, err := client.ACLTokens().Create(&nomadapi.ACLToken{Name: policy.Name, Type: "client", Policies: []string{policy.Name}}, opts)
	if err != nil {
		return Token{}, fmt.Errorf("stack: create a token in Nomad: %w", err)
	}
	return Token{token.AccessorID, token.SecretID}, nil
}

// DeleteToken deletes a token.
func (n *Nomad) DeleteToken(ctx context.Context, token Token) error {
	client, err := n.Client()
	if err != nil {
		return err
	}
	_, err = client.ACLTokens().Delete(token.Accessor, (&nomadapi.WriteOptions{}).WithContext(ctx))
	return err
}

// NewToken creates a token that may do what these rules allow. Consul must have a
// ManagementToken.
func (c *Consul) NewToken(ctx context.Context, rules string) (Token, error) {
	client, err := c.Client()
	if err != nil {
		return Token{}, err
	}
	opts := (&consulapi.WriteOptions{}).WithContext(ctx)
	policy, _, err := client.ACL().PolicyCreate(&consulapi.ACLPolicy{Name: "test-" + rand.Text(), Rules: rules}, opts)
	if err != nil {
		return Token{}, fmt.Errorf("stack: create a policy in Consul: %w", err)
	}
	token, _, err := client.ACL().TokenCreate(&consulapi.ACLToken{Policies: []*consulapi.ACLTokenPolicyLink{{ID: policy.ID}}}, opts)
	if err != nil {
		return Token{}, fmt.Errorf("stack: create a token in Consul: %w", err)
	}
	return Token{token.AccessorID, token.SecretID}, nil
}

// DeleteToken deletes a token.
func (c *Consul) DeleteToken(ctx context.Context, token Token) error {
	client, err := c.Client()
	if err != nil {
		return err
	}
	_, err = client.ACL().TokenDelete(token.Accessor, (&consulapi.WriteOptions{}).WithContext(ctx))
	return err
}
