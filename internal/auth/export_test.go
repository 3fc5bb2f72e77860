package auth

// Remembered returns how many addresses are remembered.
func (a *Authenticator) Remembered() int {
	a.failures.mu.Lock()
	defer a.failures.mu.Unlock()
	return len(a.failures.addresses)
}
